"""What pages are made of: data, not code."""
