"""What each kernel of the engine takes, beside the least that the device would need for what it does."""
