#!/bin/sh
# Builds the app of this folder, runs it on the device and fetches ios.jsonl. Needs a Mac with Xcode and a signing identity.
#   sh ios.sh UDID "Apple Development: NAME (TEAM)" TEAM.com.example.mclip-benchmark profile.mobileprovision
set -eu
cd "$(dirname "$0")"
[ $# -eq 4 ] || { echo "usage: sh ios.sh UDID IDENTITY BUNDLE_ID PROFILE" >&2; exit 2; }
udid=$1 identity=$2 id=$3 profile=$4
command -v xcrun >/dev/null || { echo "there is no xcrun: this needs a Mac with Xcode" >&2; exit 1; }
app=build/Benchmark.app
rm -rf build && mkdir -p "$app/plan"
xcrun --sdk iphoneos swiftc -parse-as-library -O -target arm64-apple-ios16.0 Benchmark.swift -o "$app/Benchmark"
cp -R plan.json inputs-image.json inputs-text.json towers "$app/plan/"
cp "$profile" "$app/embedded.mobileprovision"
cat > "$app/Info.plist" <<PLIST
<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<plist version="1.0"><dict>
<key>CFBundleExecutable</key><string>Benchmark</string><key>CFBundleIdentifier</key><string>$id</string><key>CFBundleName</key><string>Benchmark</string>
<key>CFBundlePackageType</key><string>APPL</string><key>CFBundleVersion</key><string>1</string><key>CFBundleShortVersionString</key><string>1</string>
<key>MinimumOSVersion</key><string>16.0</string><key>UILaunchScreen</key><dict/><key>LSRequiresIPhoneOS</key><true/>
</dict></plist>
PLIST
security cms -D -i "$profile" > build/profile.plist
plutil -extract Entitlements xml1 -o build/entitlements.plist build/profile.plist
codesign --force --sign "$identity" --entitlements build/entitlements.plist "$app"
xcrun devicectl device install app --device "$udid" "$app"
xcrun devicectl device process launch --device "$udid" --console --terminate-existing "$id"
xcrun devicectl device copy from --device "$udid" --domain-type appDataContainer --domain-identifier "$id" --source Documents/ios.jsonl --destination ios.jsonl
