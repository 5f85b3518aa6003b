"""Shared by the tests: ranks in processes of their own, and what runs in them."""
