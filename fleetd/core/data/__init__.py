"""The data of the core: specs, events, commands, state and the journal."""
