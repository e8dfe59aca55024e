"""Other programs' doors to the engine."""
