"""`kvchat eval`: how much of a conversation survives compression, measured by questions asked along the way."""
