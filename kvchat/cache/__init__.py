"""What KV is: the ragged KV of sealed turns and the dense tail of the open one."""
