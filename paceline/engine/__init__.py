"""Who starts and watches the processes of a run, and what each of them does."""
