def pytest_configure(config): config.addinivalue_line('markers', 'slow: takes a minute or more; run by default, `-m "not slow"` leaves it out')
