"""The optimizer's memory: parameters as flat index spaces, what a step keeps of them, what is saved and loaded."""
