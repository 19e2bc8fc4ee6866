"""What jvlm plan is made of: chips, compiled programs, their traffic, bounds, and pictures of them."""
