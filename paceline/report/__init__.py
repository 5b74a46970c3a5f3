"""What is read out of the files of runs: lists, details, pictures. Writes nothing but pictures."""
