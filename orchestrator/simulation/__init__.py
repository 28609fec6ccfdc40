"""Replays a finished sweep under another policy, in virtual time."""
