"""From configs and networks to what a user asks for."""
