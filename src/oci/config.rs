//! The configuration of an image (OCI image specification, "config.md"): only the fields that are needed here.
//!
//! Container engines accept configurations that do not follow the specification: without `architecture` and `os`, with `null` for a list.
//! So does this module.

use serde::Deserialize;

use super::{
    Digest, Platform, Process,
    artifact::What,
    manifest::{Error, MAX_CONFIG_BYTES, bounded},
};

/// The layers and the program of an image, from its configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageConfig {
    /// The platform; `None` if the configuration has no architecture.
    pub platform: Option<Platform>,
    /// Digests of the uncompressed layers, the lowest first.
    pub diff_ids: Vec<Digest>,
    /// Its program.
    pub process: Process,
}

#[derive(Deserialize)]
struct ConfigDocument {
    architecture: Option<String>,
    os: Option<String>,
    variant: Option<String>,
    rootfs: RootFs,
    config: Option<Execution>,
}

#[derive(Deserialize)]
struct RootFs {
    diff_ids: Option<Vec<String>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Execution {
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    env: Option<Vec<String>>,
    user: Option<String>,
    working_dir: Option<String>,
    stop_signal: Option<String>,
}

impl ImageConfig {
    /// The chain ID of each layer, the lowest first: the diff ID of the lowest one, then the digest of the chain ID below and the diff ID
    /// (OCI image specification, "Layer ChainID").
    pub fn chain_ids(&self) -> Vec<Digest> {
        let mut below: Option<Digest> = None;
        let chain = self.diff_ids.iter().map(|diff_id| {
            let id = below.map_or(*diff_id, |below| {
                Digest::of(format!("{below} {diff_id}").as_bytes())
            });
            below = Some(id);
            id
        });
        chain.collect()
    }

    /// Parses the configuration of an image of so many layers: it has a diff ID for each.
    pub fn parse(bytes: &[u8], layers: usize) -> Result<Self, Error> {
        bounded(bytes, MAX_CONFIG_BYTES)?;
        let document: ConfigDocument =
            serde_json::from_slice(bytes).map_err(|source| Error::Malformed {
                what: What::ImageConfig,
                source,
            })?;
        let diff_ids = document.rootfs.diff_ids.unwrap_or_default();
        if diff_ids.len() != layers {
            return Err(Error::DiffIds {
                diff_ids: diff_ids.len(),
                layers,
            });
        }
        let diff_ids = diff_ids
            .iter()
            .map(|text| text.parse::<Digest>().map_err(Error::Digest))
            .collect::<Result<_, _>>()?;
        let os = document.os.unwrap_or_default();
        let platform = document
            .architecture
            .filter(|architecture| !architecture.is_empty())
            .map(|architecture| Platform::new(&os, &architecture, document.variant.as_deref()));
        let config = document.config.unwrap_or_default();
        Ok(Self {
            platform,
            diff_ids,
            process: Process {
                entrypoint: config.entrypoint.unwrap_or_default(),
                cmd: config.cmd.unwrap_or_default(),
                env: config.env.unwrap_or_default(),
                user: config.user.unwrap_or_default(),
                working_dir: config.working_dir.unwrap_or_default(),
                stop_signal: config.stop_signal.unwrap_or_default(),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";

    fn rootfs() -> String {
        format!(r#""rootfs":{{"type":"layers","diff_ids":["{DIGEST}","{DIGEST}"]}}"#)
    }

    #[test]
    fn a_configuration_has_a_diff_id_for_each_layer() {
        let config = format!(r#"{{"architecture":"amd64","os":"linux",{}}}"#, rootfs());
        let parsed = ImageConfig::parse(config.as_bytes(), 2).unwrap();
        assert_eq!(parsed.diff_ids, [DIGEST.parse().unwrap(); 2]);
        assert_eq!(parsed.platform, Some("linux/amd64".parse().unwrap()));
        assert!(matches!(
            ImageConfig::parse(config.as_bytes(), 1),
            Err(Error::DiffIds {
                diff_ids: 2,
                layers: 1
            })
        ));
        let weak = config.replace("sha256:", "sha512:");
        assert!(matches!(
            ImageConfig::parse(weak.as_bytes(), 2),
            Err(Error::Digest(_))
        ));
        assert!(matches!(
            ImageConfig::parse(b"{}", 2),
            Err(Error::Malformed { .. })
        ));
        let long = vec![b' '; MAX_CONFIG_BYTES as usize + 1];
        assert!(matches!(
            ImageConfig::parse(&long, 2),
            Err(Error::TooLong { .. })
        ));
    }

    #[test]
    fn what_engines_take_is_taken() {
        for (start, platform) in [
            ("", None),
            (r#""architecture":"","os":"","#, None),
            (r#""os":"linux","#, None),
            (
                r#""architecture":"arm","variant":"v6","#,
                Some("linux/arm/v6"),
            ),
            (
                r#""architecture":"amd64","config":null,"history":3,"#,
                Some("linux/amd64"),
            ),
        ] {
            let config = format!("{{{start}{}}}", rootfs());
            let parsed = ImageConfig::parse(config.as_bytes(), 2).unwrap();
            assert_eq!(parsed.platform, platform.map(|text| text.parse().unwrap()));
            assert_eq!(parsed.process, Process::default());
        }
        let config = format!(
            r#"{{"config":{{"Cmd":["a"],"Env":null,"User":"u","Volumes":7}},{}}}"#,
            rootfs()
        );
        let parsed = ImageConfig::parse(config.as_bytes(), 2).unwrap();
        assert_eq!(parsed.process.cmd, ["a"]);
        assert_eq!(parsed.process.user, "u");
    }
}
