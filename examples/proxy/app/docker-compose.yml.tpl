services:
  web:
    image: {{{app.image}}}
    command: [httpd, -f, -p, "80", -h, /srv]
    stop_signal: SIGKILL          # busybox httpd hears no other; c2 has let its requests end before
    volumes: ["./public:/srv:ro"]
    ports: ["127.0.0.1:{{ports.http}}:80"]
