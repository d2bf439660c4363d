"""The data that every stage shares: calls, programs, masks, plans. Imports nothing of ours but errors."""
