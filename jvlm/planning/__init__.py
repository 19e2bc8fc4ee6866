"""What jvlm plan is made of: chips, compiled programs, their traffic, bounds, and charts of them."""
