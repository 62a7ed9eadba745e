"""What is decided: messages, state tables, plan, deadlines. No I/O, no clock, no thread: all of it runs in memory."""
