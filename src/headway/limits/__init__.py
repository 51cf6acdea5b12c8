"""What a call asks for, what a machine has, and what a backend takes: all of it data."""
