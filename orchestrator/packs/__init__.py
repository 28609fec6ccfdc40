"""What a worker does with a pack of each task, between the data that it reads and the dictionaries that it writes."""
