"""From raw web text to clean, deduplicated documents, on datatrove, every removed document accounted for."""
