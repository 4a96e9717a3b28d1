"""Meshes and sharding rules; nothing here knows about models."""
