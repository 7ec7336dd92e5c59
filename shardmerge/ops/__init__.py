"""What can be done to a tensor. Knows arrays; never names or files."""
