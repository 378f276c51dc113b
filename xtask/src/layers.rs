//! The check that no layer depends on a higher one.
//!
//! It reads what the crates declare (normal, development and build dependencies alike), not what
//! they happen to use, so a dependency is found before the first line of code uses it.

use anyhow::{Result, bail};
use serde_json::Value;

use crate::project;

/// The layers, lowest first, by the names of their packages.
const LAYERS: [&str; 8] = [
    "trapline-trace",
    "trapline-memory",
    "trapline-x86",
    "trapline-engine",
    "trapline-monitor",
    "trapline-devices",
    "trapline-machine",
    "trapline",
];

/// Members of the workspace that are no layers: no layer may depend on them.
const OUTSIDE: [&str; 1] = ["xtask"];

/// Checks the workspace and prints the verdict.
///
/// # Errors
/// If a layer depends on a higher one, on itself or on a tool, or if a package has no place.
pub fn run() -> Result<()> {
    let violations = violations(&project::metadata()?);
    if violations.is_empty() {
        println!("layers: {}", LAYERS.join(" < "));
        return Ok(());
    }
    for violation in &violations {
        eprintln!("layers: {violation}");
    }
    bail!(
        "{} violation(s) of the layers; move the shared part down instead",
        violations.len()
    );
}

/// Every violation in the given answer of `cargo metadata`, one sentence each.
fn violations(metadata: &Value) -> Vec<String> {
    let mut found = Vec::new();
    let packages = metadata["packages"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    if packages.is_empty() {
        found.push("`cargo metadata` names no packages, so nothing was checked".to_owned());
    }
    for package in packages {
        let name = package["name"].as_str().unwrap_or_default();
        if OUTSIDE.contains(&name) {
            continue;
        }
        let Some(layer) = LAYERS.iter().position(|&l| l == name) else {
            found.push(format!(
                "package `{name}` has no layer; add it to the list of layers"
            ));
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let on = dependency["name"].as_str().unwrap_or_default();
            let kind = dependency["kind"].as_str().unwrap_or("normal");
            if OUTSIDE.contains(&on) {
                found.push(format!("`{name}` depends on the tool `{on}` ({kind})"));
            }
            if LAYERS
                .iter()
                .position(|&l| l == on)
                .is_some_and(|other| other >= layer)
            {
                found.push(format!(
                    "`{name}` depends on `{on}`, which is not below it ({kind})"
                ));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn package(name: &str, dependencies: &[(&str, Option<&str>)]) -> Value {
        let dependencies: Vec<_> = dependencies
            .iter()
            .map(|(name, kind)| json!({ "name": name, "kind": kind }))
            .collect();
        json!({ "name": name, "dependencies": dependencies })
    }

    fn graph(packages: &[Value]) -> Value {
        json!({ "packages": packages })
    }

    #[test]
    fn lower_layers_and_strangers_are_allowed() {
        let graph = graph(&[
            package(
                "trapline-memory",
                &[("trapline-trace", None), ("rustix", None)],
            ),
            package(
                "trapline",
                &[("trapline-machine", None), ("clap", Some("build"))],
            ),
            package("xtask", &[("trapline", None)]),
        ]);
        assert_eq!(violations(&graph), [""; 0]);
    }

    #[test]
    fn a_higher_layer_is_refused_in_every_kind_of_dependency() {
        for kind in [None, Some("dev"), Some("build")] {
            let graph = graph(&[package("trapline-trace", &[("trapline-memory", kind)])]);
            let found = violations(&graph);
            assert_eq!(found.len(), 1, "{found:?}");
            assert!(found[0].contains("`trapline-memory`"), "{found:?}");
        }
    }

    #[test]
    fn itself_a_tool_and_an_unknown_package_are_refused() {
        let graph = graph(&[
            package("trapline-x86", &[("trapline-x86", Some("dev"))]),
            package("trapline-engine", &[("xtask", None)]),
            package("trapline-stray", &[]),
        ]);
        assert_eq!(violations(&graph).len(), 3);
    }

    #[test]
    fn an_empty_graph_is_no_success() {
        assert_eq!(violations(&json!({})).len(), 1);
    }

    #[test]
    fn the_workspace_keeps_its_layers() {
        let metadata = project::metadata().expect("cargo metadata");
        assert_eq!(violations(&metadata), [""; 0]);
    }
}
