{{app.port}}
