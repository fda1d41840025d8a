//! Whether and where spans go, by the `OTEL_*` variables of OpenTelemetry's specification. A mistake in one stops the
//! start with a line that names it, as for every other variable, where the specification would have it ignored with a
//! warning: traces that are missing are found out too late.
//!
//! What is absent on purpose: a sampler that does not ask the parent. Half a run would be worse than none.

use std::{net::ToSocketAddrs, str::FromStr};

use opentelemetry_sdk::trace::Sampler;

use crate::config::ConfigError;

const ENDPOINTS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];
const PROTOCOLS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"];
const HEADERS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS"];
const COMPRESSIONS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "OTEL_EXPORTER_OTLP_COMPRESSION"];
const INSECURE: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_INSECURE", "OTEL_EXPORTER_OTLP_INSECURE"];
const NUMBERS: [&str; 9] = [
    "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT",
    "OTEL_EXPORTER_OTLP_TIMEOUT",
    "OTEL_BSP_SCHEDULE_DELAY",
    "OTEL_BSP_EXPORT_TIMEOUT",
    "OTEL_BSP_MAX_QUEUE_SIZE",
    BATCH_SIZE,
    "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT",
    "OTEL_SPAN_EVENT_COUNT_LIMIT",
    "OTEL_SPAN_LINK_COUNT_LIMIT",
];
/// Set, they would be believed in.
const UNREAD: [&str; 6] = [
    "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE",
    "OTEL_EXPORTER_OTLP_CERTIFICATE",
    "OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY",
    "OTEL_EXPORTER_OTLP_CLIENT_KEY",
    "OTEL_EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE",
    "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE",
];

const BATCH_SIZE: &str = "OTEL_BSP_MAX_EXPORT_BATCH_SIZE";

/// Spans that are sent at once, where [`BATCH_SIZE`] does not say. The specification has 512: to turn so many into bytes
/// takes half a millisecond, for which a request that wants that core waits, whatever the exporter's priority. With fewer
/// there are a fiftieth more triggers a second, although they are sent more often.
const BATCH: usize = 128;

/// Ours: whether the collector may be missing, for an endpoint that is set in advance, as in `docker-compose.yml`.
const OPTIONAL: &str = "DBACKUP_OTLP_OPTIONAL";

/// OTLP over what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    Http,
    Grpc,
}

/// What the variables say, checked. The exporters read endpoint, headers, timeout, compression and how long spans wait by
/// themselves, and would ignore what they do not understand.
#[derive(Debug)]
pub(super) struct Plan {
    /// `None` when nothing is exported.
    pub protocol: Option<Protocol>,
    /// For an error of the exporter.
    pub endpoint_variable: &'static str,
    /// Whether the endpoint speaks TLS. For gRPC: over HTTP the exporter goes by the scheme.
    pub tls: bool,
    /// Says what becomes of a trace that begins here.
    pub sampler: Sampler,
    /// Spans that are sent at once, at most.
    pub batch: usize,
    /// `service.name`.
    pub service: String,
}

impl Plan {
    /// As the environment has it.
    pub fn from_env(service: &str) -> Result<Self, ConfigError> {
        Self::read(service, |name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    /// `get` gives the value of a variable, nothing for an empty one.
    fn read(service: &str, get: impl Fn(&str) -> Option<String>) -> Result<Self, ConfigError> {
        let first = |names: &[&'static str]| names.iter().find_map(|name| Some((*name, get(name)?)));
        let disabled = boolean("OTEL_SDK_DISABLED", get("OTEL_SDK_DISABLED"))?;
        let exporter = get("OTEL_TRACES_EXPORTER");
        let wanted = match exporter.as_deref() {
            None => first(&ENDPOINTS).is_some(),
            Some("otlp") => true,
            Some("none") => false,
            Some(other) => return refuse("OTEL_TRACES_EXPORTER", other, "otlp or none"),
        };
        let protocol = match first(&PROTOCOLS) {
            None => Protocol::Http,
            Some((name, text)) => match text.as_str() {
                "http/protobuf" => Protocol::Http,
                "grpc" => Protocol::Grpc,
                other => return refuse(name, other, "http/protobuf or grpc"),
            },
        };
        let (endpoint_variable, endpoint) = first(&ENDPOINTS).unwrap_or((ENDPOINTS[1], String::new()));
        check_endpoint(endpoint_variable, &endpoint, protocol)?;
        check_values(&get)?;
        let absent = boolean(OPTIONAL, get(OPTIONAL))? && !is_known(&endpoint);
        let insecure = match first(&INSECURE) {
            Some((name, text)) => boolean(name, Some(text))?,
            None => false,
        };
        let named = get("OTEL_SERVICE_NAME").or_else(|| attribute(&get, "service.name"));
        Ok(Self {
            protocol: (wanted && !disabled && !absent).then_some(protocol),
            endpoint_variable,
            // Of an endpoint without a scheme, which only gRPC takes, the specification says that it is secure.
            tls: endpoint.starts_with("https://") || (!endpoint.contains("://") && !endpoint.is_empty() && !insecure),
            sampler: sampler(&get)?,
            batch: get(BATCH_SIZE).and_then(|text| text.parse().ok()).unwrap_or(BATCH),
            service: named.unwrap_or_else(|| service.to_owned()),
        })
    }
}

fn refuse<T>(name: &str, value: &str, allowed: &str) -> Result<T, ConfigError> {
    Err(ConfigError(format!("{name} is '{value}' but must be {allowed}")))
}

fn boolean(name: &str, value: Option<String>) -> Result<bool, ConfigError> {
    match value.as_deref().map(str::to_ascii_lowercase).as_deref() {
        None | Some("false") => Ok(false),
        Some("true") => Ok(true),
        Some(other) => refuse(name, other, "true or false"),
    }
}

fn check_endpoint(name: &str, endpoint: &str, protocol: Protocol) -> Result<(), ConfigError> {
    let is_url = url::Url::parse(endpoint).is_ok_and(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    let is_host = protocol == Protocol::Grpc && !endpoint.contains("://");
    match endpoint.is_empty() || is_url || is_host {
        true => Ok(()),
        false => Err(ConfigError(format!("{name} is not a URL that begins with http:// or https://"))),
    }
}

/// Whether the host of an endpoint has an address. Asked once, at the start.
fn is_known(endpoint: &str) -> bool {
    let host = url::Url::parse(endpoint).ok().and_then(|url| url.host_str().map(str::to_owned));
    let host = host.unwrap_or_else(|| endpoint.split(':').next().unwrap_or_default().to_owned());
    (host.trim_matches(['[', ']']), 0).to_socket_addrs().is_ok_and(|mut addresses| addresses.next().is_some())
}

/// What the exporters read by themselves.
fn check_values(get: &impl Fn(&str) -> Option<String>) -> Result<(), ConfigError> {
    for name in HEADERS.into_iter().chain(["OTEL_RESOURCE_ATTRIBUTES"]) {
        let pairs = get(name).unwrap_or_default();
        // Never quoted: a header holds a key.
        let whole = |pair: &str| pair.split_once('=').is_some_and(|(name, _)| !name.trim().is_empty());
        if !pairs.split_terminator(',').all(whole) {
            return Err(ConfigError(format!("{name} must be name=value pairs, separated by commas")));
        }
    }
    for name in COMPRESSIONS {
        match get(name).as_deref() {
            None | Some("none" | "gzip") => {}
            Some(other) => return refuse(name, other, "none or gzip"),
        }
    }
    for name in NUMBERS {
        match get(name) {
            Some(text) if u32::from_str(&text).is_err() => return refuse(name, &text, "a whole number"),
            _ => {}
        }
    }
    match UNREAD.into_iter().find(|name| get(name).is_some()) {
        Some(name) => Err(ConfigError(format!(
            "{name} is not read by this version: SSL_CERT_FILE names a file of certificates to trust"
        ))),
        None => Ok(()),
    }
}

/// One of `OTEL_RESOURCE_ATTRIBUTES`.
fn attribute(get: &impl Fn(&str) -> Option<String>, key: &str) -> Option<String> {
    let pairs = get("OTEL_RESOURCE_ATTRIBUTES")?;
    let mut pairs = pairs.split(',').filter_map(|pair| pair.split_once('='));
    pairs.find(|(name, _)| name.trim() == key).map(|(_, value)| value.trim().to_owned())
}

/// What becomes of a trace that begins here. A parent decides, always: API, workers and whoever takes back a lost run then
/// decide alike, however they are configured.
fn sampler(get: &impl Fn(&str) -> Option<String>) -> Result<Sampler, ConfigError> {
    let name = get("OTEL_TRACES_SAMPLER").unwrap_or_default();
    match name.strip_prefix("parentbased_").unwrap_or(&name) {
        "" | "always_on" => Ok(Sampler::AlwaysOn),
        "always_off" => Ok(Sampler::AlwaysOff),
        "traceidratio" => {
            let text = get("OTEL_TRACES_SAMPLER_ARG").unwrap_or_else(|| "1".to_owned());
            match f64::from_str(&text) {
                Ok(ratio) if (0.0..=1.0).contains(&ratio) => Ok(Sampler::TraceIdRatioBased(ratio)),
                _ => refuse("OTEL_TRACES_SAMPLER_ARG", &text, "a number from 0 to 1"),
            }
        }
        _ => {
            let known = "always_on, always_off or traceidratio, each also with parentbased_ before it";
            refuse("OTEL_TRACES_SAMPLER", &name, known)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(variables: &[(&str, &str)]) -> Result<Plan, String> {
        let get = |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
        Plan::read("dbackup-test", get).map_err(|error| error.to_string())
    }

    const ENDPOINT: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318");

    #[test]
    fn nothing_is_exported_unless_a_collector_is_named_or_the_exporter_asked_for() {
        let protocol = |variables: &[(&str, &str)]| plan(variables).expect("fits").protocol;
        assert_eq!(protocol(&[]), None);
        assert_eq!(protocol(&[ENDPOINT]), Some(Protocol::Http));
        assert_eq!(protocol(&[("OTEL_TRACES_EXPORTER", "otlp")]), Some(Protocol::Http));
        assert_eq!(protocol(&[ENDPOINT, ("OTEL_TRACES_EXPORTER", "none")]), None);
        assert_eq!(protocol(&[ENDPOINT, ("OTEL_SDK_DISABLED", "TRUE")]), None);
        assert_eq!(protocol(&[ENDPOINT, ("OTEL_SDK_DISABLED", "false")]), Some(Protocol::Http));
    }

    #[test]
    fn a_collector_that_may_be_missing_is_sent_to_only_where_its_host_is_known() {
        let protocol = |endpoint, optional| {
            let variables = [("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint), ("DBACKUP_OTLP_OPTIONAL", optional)];
            plan(&variables).expect("fits").protocol
        };
        assert_eq!(protocol("http://collector.invalid:4318", "true"), None);
        assert_eq!(protocol("http://collector.invalid:4318", "false"), Some(Protocol::Http), "it may come later");
        assert_eq!(protocol("http://localhost:4318", "true"), Some(Protocol::Http));
        assert_eq!(protocol("http://[::1]:4318", "true"), Some(Protocol::Http));
    }

    #[test]
    fn the_variable_of_traces_wins_over_the_one_of_all_signals() {
        let both = [
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
            ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://traces.example:4317"),
        ];
        let plan = plan(&both).expect("fits");
        assert_eq!((plan.protocol, plan.tls), (Some(Protocol::Grpc), true));
    }

    #[test]
    fn an_endpoint_without_a_scheme_is_secure_unless_it_says_otherwise() {
        let grpc = ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc");
        let host = ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317");
        assert!(plan(&[grpc, host]).expect("fits").tls);
        assert!(!plan(&[grpc, host, ("OTEL_EXPORTER_OTLP_INSECURE", "true")]).expect("fits").tls);
    }

    #[test]
    fn a_name_given_by_the_operator_wins() {
        let service = |variables: &[(&str, &str)]| plan(variables).expect("fits").service;
        assert_eq!(service(&[]), "dbackup-test");
        let attributes = ("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=prod,service.name=backup");
        assert_eq!(service(&[attributes]), "backup");
        assert_eq!(service(&[attributes, ("OTEL_SERVICE_NAME", "named")]), "named");
    }

    #[test]
    fn a_sampler_is_the_same_with_and_without_a_word_of_the_parent_who_is_always_asked() {
        for before in ["", "parentbased_"] {
            let sampler = |name: &str| {
                let name = format!("{before}{name}");
                plan(&[("OTEL_TRACES_SAMPLER", &name), ("OTEL_TRACES_SAMPLER_ARG", "0.25")]).expect("fits").sampler
            };
            assert!(matches!(sampler("always_on"), Sampler::AlwaysOn));
            assert!(matches!(sampler("always_off"), Sampler::AlwaysOff));
            assert!(matches!(sampler("traceidratio"), Sampler::TraceIdRatioBased(0.25)));
        }
        assert!(matches!(plan(&[]).expect("fits").sampler, Sampler::AlwaysOn));
    }

    #[test]
    fn a_mistake_is_one_line_that_names_the_variable_and_tells_no_secret() {
        for (name, value) in [
            ("OTEL_SDK_DISABLED", "perhaps"),
            ("DBACKUP_OTLP_OPTIONAL", "1"),
            ("OTEL_TRACES_EXPORTER", "zipkin"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "secret.example:4318"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "ftp://secret"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "x-api-key:secret"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "brotli"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s"),
            ("OTEL_BSP_SCHEDULE_DELAY", "soon"),
            ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "few"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/ca.pem"),
            ("OTEL_EXPORTER_OTLP_INSECURE", "1"),
            ("OTEL_RESOURCE_ATTRIBUTES", "prod"),
            ("OTEL_TRACES_SAMPLER", "jaeger_remote"),
        ] {
            let error = plan(&[(name, value)]).expect_err("is refused");
            assert!(error.starts_with(name) && !error.contains('\n') && !error.contains("secret"), "{name}: {error}");
        }
        let ratio = [("OTEL_TRACES_SAMPLER", "traceidratio"), ("OTEL_TRACES_SAMPLER_ARG", "1.5")];
        assert!(plan(&ratio).expect_err("is refused").starts_with("OTEL_TRACES_SAMPLER_ARG"));
    }
}
