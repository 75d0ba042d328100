"""What is asked, what may be answered, and the independent checker of answers."""
