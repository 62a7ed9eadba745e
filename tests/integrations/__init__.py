"""Real servers, upgraded under load: no request fails, and each tells its own goodbye when its generation drains."""
