{{app.greeting}} version {{build.version}}
