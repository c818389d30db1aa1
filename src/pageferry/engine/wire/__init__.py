"""The connection between two hosts: channels, pacing, joining, and the conversation around the stream."""
