"""patching/discovery."""
