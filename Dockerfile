# Targets: `api`, and `worker` with the dump tools. Both hold `dbackup` too. docker-compose.yml builds them.
#   docker build --target worker --build-arg POSTGRES_MAJORS="15 16" .

FROM rust:1-slim-trixie AS build
# A step that fails in the middle of a pipe is a failure.
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /src
# A profile of Cargo.toml: `ci` builds in half the time, without link-time optimisation.
ARG PROFILE=release
COPY . .
# Crates, and what was compiled of them, outlive the layer. Cargo goes by the time of a file: a crate of which any file
# differs from that of the last build is new (macros read more than the compiler tells of), and after a change of what
# belongs to no crate, such as a migration, all of them are. The others keep their times, and are not compiled again.
RUN --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked \
    --mount=type=cache,target=/build,sharing=locked \
    { cd /build && find . -path ./target -prune -o -type f -print | \
        while read -r file; do if [ ! -f "/src/$file" ]; then rm "$file"; echo "$file"; fi; done; \
      find . -mindepth 1 -type d -empty -not -path './target/*' -delete; \
      cd /src && find . -type f | \
        while read -r file; do if ! cmp -s "$file" "/build/$file"; then install -D -m 644 "$file" "/build/$file"; echo "$file"; fi; done; \
    } | cut -d/ -f2 | sort -u | \
      while read -r part; do if [ ! -d "/build/$part/src" ]; then part='*'; fi; touch /build/$part/src/*.rs; done && \
    cd /build && cargo build --locked --profile "$PROFILE" --package api --package worker --package cli && \
    mkdir /programs && cp target/"$PROFILE"/dbackup target/"$PROFILE"/dbackup-api target/"$PROFILE"/dbackup-worker /programs

# What both targets share: authorities for TLS, and the user. Its number is fixed, because files in volumes bear it.
FROM debian:trixie-slim AS base
RUN apt-get update && \
    apt-get install -y --no-install-recommends ca-certificates && \
    rm -rf /var/lib/apt/lists/* && \
    groupadd --gid 10001 dbackup && \
    useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin dbackup && \
    # A new volume takes its owner and mode from here.
    install -d -o dbackup -g dbackup -m 0750 /var/backups/dbackup

FROM base AS api
COPY --from=build /programs/dbackup /programs/dbackup-api /usr/local/bin/
USER 10001:10001
EXPOSE 3000
ENV DBACKUP_LISTEN=0.0.0.0:3000
HEALTHCHECK --interval=5s --timeout=4s --start-period=60s CMD ["dbackup", "health", "--api", "http://127.0.0.1:3000"]
CMD ["dbackup-api"]

FROM base AS worker
# Majors of PostgreSQL whose tools come on top of Debian's own, from the PostgreSQL project's repository.
ARG POSTGRES_MAJORS=""
RUN apt-get update && \
    apt-get install -y --no-install-recommends postgresql-client mariadb-client && \
    if [ -n "$POSTGRES_MAJORS" ]; then \
      /usr/share/postgresql-common/pgdg/apt.postgresql.org.sh -y && \
      apt-get install -y --no-install-recommends $(printf 'postgresql-client-%s ' $POSTGRES_MAJORS); \
    fi && \
    rm -rf /var/lib/apt/lists/*
COPY --from=build /programs/dbackup /programs/dbackup-worker /usr/local/bin/
USER 10001:10001
HEALTHCHECK --interval=15s --timeout=10s --start-period=60s CMD ["dbackup", "health", "--worker"]
CMD ["dbackup-worker"]
