"""Import PM2 ecosystem files, dumps and `pm2 jlist`."""
