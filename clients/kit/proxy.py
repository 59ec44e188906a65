"""nginx in front of the SuperLink: TLS, and of Flower's APIs `/v1/fleet/` alone.

SuperLink authenticates that API and no other: through the others anyone who reaches the port registers a node, takes a task or
runs code. A request passes when its raw address is /v1/fleet/NAME, before nginx or the SuperLink decodes anything in it.
"""

SERVER = """\
# Include in nginx's http context, as /etc/nginx/conf.d/veilora.conf does, or run the nginx.conf beside this file.
upstream veilora_superlink {
    server 127.0.0.1:@superlink_port@;
    keepalive 16;
    keepalive_timeout 4s;               # the SuperLink closes an idle connection after 5 s
}

server {
    listen @listen@ ssl;
    server_name @host@;
    server_tokens off;

    ssl_certificate     @home@/server.pem;
    ssl_certificate_key @home@/server.key;
    ssl_protocols       TLSv1.2 TLSv1.3;
    ssl_session_cache   shared:veilora:1m;

    client_max_body_size    64m;
    client_body_buffer_size 8m;         # Flower sends arrays in pieces of 5 MiB: none touches a disk here
    client_body_timeout     60s;

    location / {
        return 404;
    }

    location /v1/fleet/ {
        if ($request_uri !~ "^/v1/fleet/[a-z-]+$") {
            return 404;
        }
        if ($request_method != POST) {
            return 405;
        }
        proxy_pass https://veilora_superlink;
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header Host $host;
        proxy_read_timeout 60s;
        proxy_buffering off;

        proxy_ssl_verify              on;
        proxy_ssl_trusted_certificate @home@/ca.crt;
        proxy_ssl_name                localhost;
        proxy_ssl_session_reuse       on;
    }
}
"""

MAIN = """\
# A proxy of its own, in a container or on loopback: nginx -e stderr -p FOLDER_TO_WRITE_IN -c @home@/nginx.conf
daemon off;
pid nginx.pid;
worker_processes 1;
error_log stderr warn;

events {
    worker_connections 1024;
}

http {
    access_log            off;
    client_body_temp_path body;
    proxy_temp_path       proxy;
    fastcgi_temp_path     fastcgi;
    uwsgi_temp_path       uwsgi;
    scgi_temp_path        scgi;
    include               @home@/proxy.conf;
}
"""
