"""How and where evaluations run: in this process, in child processes, on Ray, or on a virtual clock."""
