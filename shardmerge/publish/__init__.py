"""Makes a result appear whole or not at all, and verifies one."""
