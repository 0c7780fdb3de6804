"""What KV is kept: scorers say how much each pair matters, the compressor ranks the pairs and cuts the ranking."""
