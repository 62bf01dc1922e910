"""One sequence on several devices: each holds a slice of it, and fetches the keys that its queries see beyond."""
