//! Metric families as values, and their two text forms.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text},
    metrics::MetricType,
    registry::Registry,
};

use crate::metrics::Distribution;

/// A family of metrics at one moment.
#[derive(Clone, Debug)]
pub struct Family {
    /// Its name, without the `_total` of a counter of this program.
    pub(super) name: &'static str,
    pub(super) help: &'static str,
    pub(super) kind: Type,
    pub(super) samples: Samples,
}

/// The type of a family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Type {
    Counter,
    /// A counter of another program, whose samples have the name of the family. OpenMetrics has no such counters: there it is of unknown type.
    ForeignCounter,
    Gauge,
    Histogram,
}

/// The labels that tell the samples of a family apart, and their values.
pub(super) type Labels = Vec<(&'static str, String)>;

/// The samples of a family.
#[derive(Clone, Debug)]
pub(super) enum Samples {
    Numbers(Vec<(Labels, f64)>),
    Distributions(Vec<(Labels, Distribution)>),
}

impl Samples {
    /// One sample without a label.
    pub(super) fn one(value: f64) -> Self {
        Self::Numbers(vec![(Labels::new(), value)])
    }

    /// One number for each value of a label.
    pub(super) fn by<V: Into<String>>(
        label: &'static str,
        values: impl IntoIterator<Item = (V, u64)>,
    ) -> Self {
        let values = values.into_iter();
        let labelled = values.map(|(value, count)| (vec![(label, value.into())], count as f64));
        Self::Numbers(labelled.collect())
    }
}

/// The form of an exposition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricsFormat {
    /// Prometheus' text format 0.0.4.
    Text,
    /// OpenMetrics 1.0.
    OpenMetrics,
}

impl MetricsFormat {
    /// The form that a client prefers, from its `Accept` header; text if it does not say.
    pub fn of_accept(accept: Option<&str>) -> Self {
        let quality = |wanted: &str| {
            let ranges = accept.unwrap_or_default().split(',').map(str::trim);
            let of_type = ranges.filter(|range| range.split(';').next() == Some(wanted));
            let qualities = of_type.map(|range| {
                let mut parameters = range.split(';').map(str::trim);
                let quality = parameters.find_map(|it| it.strip_prefix("q="));
                quality.map_or(1.0, |quality| quality.parse().unwrap_or(0.0))
            });
            qualities.fold(0.0_f64, f64::max)
        };
        let openmetrics = quality("application/openmetrics-text");
        match openmetrics > 0.0 && openmetrics >= quality("text/plain") {
            true => Self::OpenMetrics,
            false => Self::Text,
        }
    }

    /// The media type.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }

    /// Writes families in this form.
    pub(super) fn write(self, families: Vec<Family>) -> Result<String, fmt::Error> {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Families(families)));
        let mut written = String::new();
        text::encode(&mut written, &registry)?;
        Ok(match self {
            Self::OpenMetrics => written,
            Self::Text => as_text(&written),
        })
    }
}

/// OpenMetrics as text 0.0.4: there a counter's family has the name of its samples, and units and the end are not marked. Of unknown type are
/// counters of another program.
fn as_text(openmetrics: &str) -> String {
    let mut text = String::with_capacity(openmetrics.len());
    let counters: Vec<&str> = openmetrics
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter"))
        .collect();
    for line in openmetrics.lines() {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some("UNIT" | "EOF"), ..) => continue,
            (Some("#"), Some("TYPE"), Some(name), Some("unknown")) => {
                text.push_str(&format!("# TYPE {name} counter"));
            }
            (Some("#"), Some(what), Some(name), Some(rest)) if counters.contains(&name) => {
                text.push_str(&format!("# {what} {name}_total {rest}"));
            }
            _ => text.push_str(line),
        }
        text.push('\n');
    }
    text
}

#[derive(Debug)]
struct Families(Vec<Family>);

impl Collector for Families {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for family in &self.0 {
            let kind = match family.kind {
                Type::Counter => MetricType::Counter,
                Type::ForeignCounter => MetricType::Unknown,
                Type::Gauge => MetricType::Gauge,
                Type::Histogram => MetricType::Histogram,
            };
            let mut metric = encoder.encode_descriptor(family.name, family.help, None, kind)?;
            match &family.samples {
                Samples::Numbers(samples) => {
                    for (labels, value) in samples {
                        with_labels(&mut metric, labels, |sample| match family.kind {
                            Type::Counter => {
                                sample.encode_counter::<NoLabelSet, f64, f64>(value, None)
                            }
                            Type::ForeignCounter | Type::Gauge | Type::Histogram => {
                                sample.encode_gauge(value)
                            }
                        })?;
                    }
                }
                Samples::Distributions(samples) => {
                    for (labels, it) in samples {
                        with_labels(&mut metric, labels, |sample| {
                            let (sum, count) = (it.sum_seconds, it.count);
                            sample.encode_histogram::<NoLabelSet>(sum, count, &it.buckets, None)
                        })?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Encodes one sample. An empty set of labels would be written as `{}`, which the text format does not have.
fn with_labels(
    metric: &mut MetricEncoder<'_>,
    labels: &Labels,
    encode: impl FnOnce(&mut MetricEncoder<'_>) -> fmt::Result,
) -> fmt::Result {
    match labels.is_empty() {
        true => encode(metric),
        false => encode(&mut metric.encode_family(labels)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_gets_the_form_that_it_prefers() {
        use MetricsFormat::{OpenMetrics, Text};
        let prometheus = "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.1";
        for (accept, expected) in [
            (None, Text),
            (Some(""), Text),
            (Some("*/*"), Text),
            (Some(prometheus), OpenMetrics),
            (Some("text/plain, application/openmetrics-text;q=0.5"), Text),
            (
                Some("application/openmetrics-text; version=1.0.0"),
                OpenMetrics,
            ),
            (Some("application/openmetrics-text;q=0"), Text),
            (Some("application/openmetrics-text;q=x;;,,"), Text),
        ] {
            assert_eq!(MetricsFormat::of_accept(accept), expected, "{accept:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_accept_header_gives_a_form(accept in proptest::prelude::any::<String>()) {
            MetricsFormat::of_accept(Some(&accept)).content_type();
        }
    }

    #[test]
    fn both_forms_of_a_counter_and_a_gauge() {
        let families = || {
            let family = |name, kind, samples| Family {
                name,
                help: "Help",
                kind,
                samples,
            };
            vec![
                family("a", Type::Counter, Samples::one(3.0)),
                family("b", Type::Gauge, Samples::by("is", [("x\"\n", 1)])),
                family("c", Type::ForeignCounter, Samples::one(2.0)),
            ]
        };
        assert_eq!(
            MetricsFormat::OpenMetrics.write(families()).unwrap(),
            "# HELP a Help\n# TYPE a counter\na_total 3.0\n# HELP b Help\n# TYPE b gauge\nb{is=\"x\\\"\\n\"} 1.0\n# HELP c Help\n# TYPE c unknown\nc 2.0\n# EOF\n"
        );
        assert_eq!(
            MetricsFormat::Text.write(families()).unwrap(),
            "# HELP a_total Help\n# TYPE a_total counter\na_total 3.0\n# HELP b Help\n# TYPE b gauge\nb{is=\"x\\\"\\n\"} 1.0\n# HELP c Help\n# TYPE c counter\nc 2.0\n"
        );
    }
}
