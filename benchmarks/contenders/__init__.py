"""What is timed against each other in a case, and the limits that the memory sets."""
