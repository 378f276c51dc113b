//! The report's page in a browser.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::guest::text;

/// A Chromium that is installed here.
fn chromium() -> Option<&'static str> {
    [
        "chromium",
        "chromium-browser",
        "google-chrome",
        "google-chrome-stable",
    ]
    .into_iter()
    .find(|name| {
        let version = Command::new(name).arg("--version").output();
        version.is_ok_and(|output| output.status.success())
    })
}

/// The document that a page has become after its program ran; `None`, with a message, where there
/// is no Chromium. `part` is what stands behind the # in the address.
pub fn document(page: &Path, part: &str, profile: &Path) -> Option<String> {
    let Some(chromium) = chromium() else {
        eprintln!("skipped: no Chromium is installed, so the page is not looked at in a browser");
        return None;
    };
    let output = Command::new("timeout")
        .args(["120", chromium])
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--window-size=1400,1800",
            "--virtual-time-budget=10000",
            "--dump-dom",
        ])
        .arg(format!("--user-data-dir={}", profile.display()))
        .arg(format!("file://{}#{part}", page.display()))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let document = text(&output.stdout);
    assert!(
        output.status.success() && document.contains("</html>"),
        "{chromium}: {}\n{}",
        output.status,
        text(&output.stderr)
    );
    Some(document)
}
