"""Which old turns a question concerns, and what a conversation is about, part by part."""
