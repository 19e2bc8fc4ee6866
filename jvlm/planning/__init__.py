"""What tools/plan.py is made of: chips, compiled programs, their traffic, bounds, and pictures of them."""
