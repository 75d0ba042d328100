"""What a plan will deliver: analytically for the search, by simulation for what is reported."""
