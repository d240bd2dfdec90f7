"""Row-wise functions in C for the CPU: one pass over memory where PyTorch needs several; plain paths stay beside."""
