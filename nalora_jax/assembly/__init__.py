"""The program of a run: objective, optimizer, mechanisms, initial adapters and compiled step."""
