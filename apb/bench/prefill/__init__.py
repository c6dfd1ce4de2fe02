"""The whole prefill, every method: time to first token, by phase and by host; measured, simulated or counted."""
