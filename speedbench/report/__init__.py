"""Stored runs -> what people read: a summary, and its console, markdown and JSON forms."""
