"""Messages between processes, their transport, and the keys that authenticate them."""
