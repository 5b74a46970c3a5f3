"""Workers in processes that home has not forked, perhaps on other hosts, and their deputies at home."""
