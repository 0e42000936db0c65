"""Fetching adapters from folders, a hub, S3 and web servers onto the local disk."""
