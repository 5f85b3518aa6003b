"""Text from a model as it trains: its own weights, its own layout, keys and values of earlier tokens kept."""
