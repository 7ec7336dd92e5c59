"""What people run today instead, each as a program of its own."""
