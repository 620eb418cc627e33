"""What is to be measured on a GPU, and what is estimated without one."""
